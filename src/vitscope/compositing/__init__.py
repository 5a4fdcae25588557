"""What if it were smaller, elsewhere, apart? Objects cut out of a photo and put back otherwise."""
