"""The command line: options, progress, tables, pages, plots."""
