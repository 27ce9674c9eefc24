"""What each sync strategy would take, from a few measured seconds and the schedule that real runs have."""
