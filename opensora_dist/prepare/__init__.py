"""Raw captioned video to latent shards, and the toy video that needs no download."""
