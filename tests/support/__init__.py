"""What tests share: models, drivers, oracles, strategies."""
