"""Weight transports, which carry weights from the trainer to the explorers."""
