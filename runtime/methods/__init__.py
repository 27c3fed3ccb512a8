"""Policies about which model calls to make; one method a file."""
