"""One backend per library, with a common protocol: everything that vitscope needs to know about the library."""
