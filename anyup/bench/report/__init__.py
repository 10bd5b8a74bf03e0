"""The page of `anyup bench`: numbers in words, tables, plots."""
