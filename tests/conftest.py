"""Its place makes pytest put ``tests/`` on the import path, so that test files of every folder share the factories here."""
