"""The arguments of a public function: options validated, targets resolved, one problem made."""
