"""From network to network: fold, convert, factorise, loop, deepen, compress, re-estimate, export."""
