"""Launchers start a job's ranks somewhere; they import the ground modules only and never torch."""
