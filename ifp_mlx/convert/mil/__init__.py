"""Runs a saved Core ML package in numpy."""
