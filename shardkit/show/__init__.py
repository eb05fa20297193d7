"""Pictures, pages and progress bars."""
