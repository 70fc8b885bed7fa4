"""Video diffusion transformers: one skeleton, its blocks, initial values and importers of published weights."""
