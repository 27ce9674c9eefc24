"""The LightningModule, its loader, and the maths of the update."""
