"""Toy video: coloured shapes that move over textured backgrounds, exact captions, ground truth, scores by classical vision."""
