"""Measurements and where they are kept: the working SQLite database and the committed export."""
