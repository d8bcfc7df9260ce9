"""What people see: each result rendered for a terminal of 80 columns, or drawn."""
