"""The report of launch/compare.py.

statistics.py: differences between two sets of runs, with their confidence intervals
results.py: the finished runs of a grid -> rows, and the hours that they are compared by
sentences.py: each method against each control, in words
tables.py: all rows, and the slides' two tables, measured beside published
figure.py: top-1 against hours, with the Pareto front
page.py: all of it -> HTML, Markdown and CSV
"""
