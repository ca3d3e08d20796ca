"""How gradients are reduced: what lives is packed, averaged and unpacked."""
