"""Many loads, in pairs: ratios, intervals and a verdict."""
