"""The pages of `anyup bench` and `anyup tune`: numbers in words, tables, plots."""
