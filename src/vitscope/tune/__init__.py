"""Fine-tuning and comparing: one data set, models of any library, ways to tune them, and what that did to attention."""
