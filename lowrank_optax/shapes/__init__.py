"""Answers from shapes alone: reports, bytes and shardings of optimizer states."""
