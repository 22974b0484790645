"""What levels are worth: errors, whole-model KL of uniform models and seconds, one recipe of the database against another."""
