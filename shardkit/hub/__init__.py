"""The Hub: `access` asks it, `remote` reads ranges of its files, `source` opens and downloads models."""
