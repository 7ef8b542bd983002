"""What a public function does with its arguments: options validated, targets resolved, one Problem made."""
