"""Runs as one HTML page that needs nothing else: facts.py, ranking.py and swept.py say what is known, as plain data;
curves.py, details.py and points.py make charts of it; html.py the page."""
