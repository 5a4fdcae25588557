"""Fine-tuning: data sets, tuning methods, training runs, and comparisons of models and methods."""
