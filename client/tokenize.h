/* tandem tokenize: text or chats to token ids, offline. */
#pragma once
int client_tokenize(int argc, char **argv);
