"""The two products of a layer of experts, fused with what lies around them."""
