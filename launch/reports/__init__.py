"""What launch/report.py is made of: logs are read, tables and figures made of them, and one page of both.

read.py: run directories -> runs, and which of them are repetitions of each other
published.py: the paper's numbers
tables.py: runs -> rows of means and deviations -> Markdown and CSV
figures.py: runs -> PNG files with captions
page.py: all of it -> one HTML file
"""
