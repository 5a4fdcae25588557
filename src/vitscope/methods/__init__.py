"""Attribution methods: one module per technique, named as in its paper."""
