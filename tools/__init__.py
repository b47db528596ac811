"""Programs behind the lesson: zero-shot tasks, what latents tell, pages, plots."""
