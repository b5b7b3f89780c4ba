"""What several tests share: commands, laws, drawn files, models, runs. No test imports another test."""
