"""One backend per library: the facts that the rest of the package needs, behind one protocol."""
