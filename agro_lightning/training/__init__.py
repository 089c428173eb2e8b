"""The LightningModule, its data module, strategy, metrics and callbacks."""
