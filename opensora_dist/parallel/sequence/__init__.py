"""Sequence parallelism: the tokens of one sample spread over ranks. One file per scheme, behind one function of a branch."""
