"""From network to network: fold, convert, factorise, loop, deepen, re-estimate, export."""
