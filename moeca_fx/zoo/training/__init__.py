"""How the zoo's trained models came to be: one trainer and one judgement for every `Task`."""
