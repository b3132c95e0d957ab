"""The named methods, one small file each: published parameters, and the parts they are made of."""
