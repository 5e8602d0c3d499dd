"""A network in, a network out: fold, convert, factorise, loop, deepen, compress, export."""
