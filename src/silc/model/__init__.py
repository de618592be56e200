"""The model: two towers in one space, and the heads that training adds."""
