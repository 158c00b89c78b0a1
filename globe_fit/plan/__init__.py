"""Predictions before the work: what a fit takes, what a compressed model will take."""
