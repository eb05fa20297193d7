"""What every room stands on: errors, sizes, text, records, jobs and the machine."""
