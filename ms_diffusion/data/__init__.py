"""Images and labels: where they come from, and the pipeline that feeds them to training."""
