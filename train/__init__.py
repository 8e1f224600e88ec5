"""Images -> run folder: views, self-supervised methods, trainer, evaluation (needs torch)."""
