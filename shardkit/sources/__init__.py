"""Where a checkpoint's files are: a folder here, or a commit on the Hub."""
