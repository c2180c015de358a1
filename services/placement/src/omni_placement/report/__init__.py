"""Layouts for people: figures of them, and a report a paper could print. Pure but for the files it writes."""
