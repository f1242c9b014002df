"""Measures harlora against its peers, on any machine: what is measured, who competes, the runs and their reports."""
