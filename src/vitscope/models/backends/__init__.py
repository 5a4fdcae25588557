"""One backend per library behind one protocol: everything vitscope needs to know about a library."""
