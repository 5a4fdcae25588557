"""Methods: one file per technique, named as its paper names it."""
