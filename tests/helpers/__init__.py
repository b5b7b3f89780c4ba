"""Code that several tests share: commands, checks, drawn files, models and runs. No test imports another test."""
